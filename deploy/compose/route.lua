-- Routes every radiograph that Orthanc receives to Osteon; reports, and whatever else comes, stay.
function OnStoredInstance(instance, tags, metadata, origin)
   if tags['Modality'] == 'CR' or tags['Modality'] == 'DX' then
      SendToModality(instance, 'osteon')
   end
end
